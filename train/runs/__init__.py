"""Run folders: settings, metrics logs, experiment trackers."""
