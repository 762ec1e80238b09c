"""A model of the devices that clients run on: when they are there, and what time, energy and memory a turn takes them.

Everything is computed from counts of the run itself (multiply-accumulates executed, bytes sent, bytes held) and from
figures of devices; no clock is read, so a run gives the same times wherever and whenever it is made.
"""

from .devices import PRESETS, Device
from .model import Played, System, Usage, Visit
from .trace import Trace, read_trace

__all__ = ["PRESETS", "Device", "Played", "System", "Trace", "Usage", "Visit", "read_trace"]
