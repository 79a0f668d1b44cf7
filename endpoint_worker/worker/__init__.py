"""Worker processes: how they are made (`zygote`), what they do (`runtime`), how the agent speaks with them (`channel`)."""
