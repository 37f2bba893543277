"""Which MSI-X vector tells of what (virtio 1.3 section 4.1.5.1.2)."""

from __future__ import annotations

from avmm.pci.msix import Msix
from avmm.virtio.interrupt import NO_FD, Interrupt, Interrupts

NO_VECTOR = 0xFFFF


class Vectors:
    """The vectors that a driver gave to the configuration and to each queue. Loop, but for what
    reads them. Without MSI-X, and without a vector, only the ISR status tells."""

    def __init__(self, interrupts: Interrupts, queues: int, msix: Msix) -> None:
        self._interrupts = interrupts
        self._msix = msix
        self.config = NO_VECTOR
        self.queues = [NO_VECTOR] * queues

    def set_config(self, vector: int) -> None:
        """The vector of configuration changes. One that does not exist reads back as none, which
        is the driver's to notice."""
        self.config = self._existing(vector)
        self._apply(self._interrupts.config, self.config)

    def set_queue(self, index: int, vector: int) -> None:
        """Queue `index`'s; likewise."""
        self.queues[index] = self._existing(vector)
        self._apply(self._interrupts.queue(index), self.queues[index])

    def forget(self) -> None:
        """Take all back."""
        self.config = NO_VECTOR
        self.queues = [NO_VECTOR] * len(self.queues)
        self.apply()

    def apply(self) -> None:
        """Let every interrupt go where its vector does, after MSI-X was switched on or off."""
        self._apply(self._interrupts.config, self.config)
        for index, vector in enumerate(self.queues):
            self._apply(self._interrupts.queue(index), vector)

    def _existing(self, vector: int) -> int:
        return vector if vector < len(self._msix) else NO_VECTOR

    def _apply(self, interrupt: Interrupt, vector: int) -> None:
        connected = self._msix.enabled and vector != NO_VECTOR
        interrupt.set_fd(self._msix.fd(vector) if connected else NO_FD)
