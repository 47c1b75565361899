"""`RedisStorage`: sessions on a Redis server, for bots on many machines."""

from .storage import RedisStorage as RedisStorage
