"""A published run at work: predict, evaluate, export, serve, and the commands that make it again."""
