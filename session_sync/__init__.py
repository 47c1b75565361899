"""Sessions for Telegram bots: loaded before the handler, locked while it runs, saved after it."""

__version__ = "0.1.0"
