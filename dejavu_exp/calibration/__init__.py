"""Is the instrument right? It measures memorization that was planted, at rates that are known."""
