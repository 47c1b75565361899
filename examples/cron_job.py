"""The sessions of all users, outside of any handler: a nightly job, an admin's tool.

It runs by itself: python examples/cron_job.py

A bot would call `give_coupons` in a thread of its own process. A session is locked for a moment
only, and an update that comes in that moment is handled right after it.
"""

from datetime import timedelta

from session_sync import ListableStorage, Session, SessionManager, StorageKey, ttl

A_WEEK = timedelta(days=7)


def give_coupons(sessions: SessionManager[Session]) -> list[StorageKey]:
    """Give a coupon for a week to each user with three visits, and print which users got one."""
    storage = sessions.storage
    assert isinstance(storage, ListableStorage)
    lucky = []
    for name in sorted(storage.keys()):  # names only: nothing is locked or loaded
        key = StorageKey.parse(name)
        with sessions.session_scope(key) as session:  # locked and loaded here, saved at the end
            if session.get("visits", 0) >= 3 and "coupon" not in session:
                session.coupon = ttl("TEA-10", A_WEEK)
                lucky.append(key)
    return lucky


def main() -> None:
    """Let some users visit, as the bot's handlers would do, and do two nights' work."""
    sessions = SessionManager()
    for user, visits in ((1, 2), (2, 3), (3, 7)):
        with sessions.session_scope(StorageKey(user=user, chat=user)) as session:
            session.visits = visits

    for night in ("first", "second"):
        lucky = give_coupons(sessions)
        print(f"{night} night: {len(lucky)} coupons")
        for key in lucky:
            print(f"  user {key.user}")

    # The storage itself, past the lock: good for a look. A handler may overwrite what is set here.
    stored = sessions.storage.get("user:2:chat:2") or {}
    print("stored for user 2:", ", ".join(sorted(stored)))


if __name__ == "__main__":
    main()
