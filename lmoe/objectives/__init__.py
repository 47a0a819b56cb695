"""What a model learns: one file a task, chosen by `task.name`."""
