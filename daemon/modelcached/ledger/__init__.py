"""Who may use how much space, who uses what, and what may go: pure rules and one SQLite file.

Never touches the network or model files. Not thread-safe: the event loop's alone.
"""
