"""Data: folders of images, decoding, transforms, loaders."""
