"""From what training leaves behind to models for other programs, each checked against the original."""
