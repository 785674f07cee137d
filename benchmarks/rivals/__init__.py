"""One driver a rival, each run as its own process with the rivals' interpreter; none of them imports planish."""
