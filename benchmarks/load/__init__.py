"""The parts of serve_load.py: what is asked, who asks it, the server, and the right answers."""
