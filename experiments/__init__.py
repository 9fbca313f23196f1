"""The experiments, one folder a task; `common` holds what they share."""
