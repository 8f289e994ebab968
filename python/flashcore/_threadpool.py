"""Makes threadpoolctl's limits apply to flashcore's threads."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Registers flashcore's thread pool, where there is a threadpoolctl to register it with."""
    try:
        from threadpoolctl import LibController, register
    except ImportError:
        return

    class FlashcoreController(LibController):  # type: ignore[misc]
        user_api = "flashcore"
        internal_api = "flashcore"
        filename_prefixes = ("libflashcore",)
        check_symbols = ("flashcore_get_num_threads",)

        def get_num_threads(self) -> Any:
            return self.dynlib.flashcore_get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            self.dynlib.flashcore_set_num_threads(num_threads)

        def get_version(self) -> str:
            from flashcore._core import VERSION

            return VERSION

    register(FlashcoreController)
