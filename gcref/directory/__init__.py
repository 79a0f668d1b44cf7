"""Who is where: the records of endpoints (later also the hub's directory)."""
