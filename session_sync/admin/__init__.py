"""What operators use: the command line, and the importers of other libraries' sessions."""
