"""The agent: the process of an endpoint. `python -m endpoint_worker.agent` runs it; `control` is its loop."""
