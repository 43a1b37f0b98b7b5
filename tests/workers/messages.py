"""What a worker's trainer logs, as texts."""

import logging


class Messages(logging.Handler):
    """Keeps the texts of the records that a logger passes on."""

    def __init__(self, level: int = logging.NOTSET):
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(record.getMessage())
