"""The endpoint: the agent, its workers, its store and the command that runs them as a daemon."""
