"""The experiments: one folder a task, each with main.py, config.py, task.py and report.py."""
