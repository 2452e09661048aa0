"""What a run reports: logs, progress, monitoring, pictures."""
