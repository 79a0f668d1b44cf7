"""Who is where: the records of endpoints (later also the hub's directory), and how an agent is started."""
