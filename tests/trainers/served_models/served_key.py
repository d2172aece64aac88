"""What the servers of these tests want to hear."""

KEY = "sesame-of-the-team"
