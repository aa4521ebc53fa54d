"""What takes longer than a second says what it is doing, and for how long."""

import contextlib
import threading
from collections.abc import Iterator

from tqdm.auto import tqdm

_DELAY_S = 1.0


@contextlib.contextmanager
def progress(title: str) -> Iterator[None]:
    """Show ``title`` and the time elapsed while the body runs, from its second second on."""
    done = threading.Event()
    bar = tqdm(desc=title, delay=_DELAY_S, bar_format="{desc}: {elapsed}", leave=False)

    def tick() -> None:
        while not done.wait(0.2):
            bar.update()

    ticker = threading.Thread(target=tick, name="fastgen-progress", daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        bar.close()
