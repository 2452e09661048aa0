"""Packing: images of any source into tar archives that training reads in place."""
