"""Every family of models, proven on small random ones: how far each runner is from the original."""
