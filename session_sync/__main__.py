"""`python -m session_sync` is `session-sync`."""

from .admin.cli import main

if __name__ == "__main__":
    main()
