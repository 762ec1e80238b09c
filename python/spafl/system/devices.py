"""Classes of devices: what they compute, send and hold, and the power that takes; presets with their sources.

A figure is measured or from a data sheet where a source is named, and an assumption where the text says so. They place
a class within its order of magnitude; whoever has a device writes down its own (``[system.classes.NAME]``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["PRESETS", "Device"]


@dataclass(frozen=True)
class Device:
    """A device.

    Args:
        flops: floating-point operations per second in training; a multiply-accumulate is two.
        down, up: bits per second.
        memory: bytes that a training may take.
        watts: power while it computes.
        down_watts, up_watts: power while it receives and sends.
    """

    flops: float
    down: float
    up: float
    memory: float
    watts: float
    down_watts: float
    up_watts: float

    def faster(self, factor: float) -> Device:
        """One that computes and communicates so many times as fast, with the same power."""
        return replace(self, flops=self.flops * factor, down=self.down * factor, up=self.up * factor)


PRESETS: dict[str, Device] = {
    # flops: training on the CPU of Snapdragon 8 phones was measured at 15 to 30 GFLOP/s (Das et al., arXiv
    #   2202.10100); the lower end.
    # down, up: median throughput of LTE, 13 and 6 Mbit/s (Huang et al., "A close examination of performance and power
    #   characteristics of 4G LTE networks", MobiSys 2012).
    # memory: assumption, 1 GiB for an application in the background.
    # watts: assumption. Power of the radio: assumption too, 2 W receiving and 4 W sending.
    "phone": Device(15e9, 13e6, 6e6, 2**30, watts=3.0, down_watts=2.0, up_watts=4.0),
    # flops: Linpack on a Raspberry Pi 4 with a 64-bit system, about 8 GFLOP/s (B. Feiereisen, "Benchmarking the
    #   Raspberry Pi 4 with Raspberry Pi OS64", feiereisen.net, 2022); in double precision, so a lower bound.
    # down, up: the benchmark of fixed broadband of the FCC, 100 and 20 Mbit/s (2024 Section 706 Report, GN docket
    #   22-270).
    # memory: assumption, 3 GiB of the model with 4 GiB.
    # watts: 5.4 W under high load; 4.7 W under normal load is taken for a board that communicates (measured at the
    #   supply, chipwired.com, "How much power a Raspberry Pi uses").
    "raspberry-pi-4": Device(8e9, 100e6, 20e6, 3 * 2**30, watts=5.4, down_watts=4.7, up_watts=4.7),
    # An STM32H743 (480 MHz, 1 MB of RAM: STMicroelectronics DS12110) with an ESP32 as its radio.
    # flops: assumption, a multiply-accumulate in four cycles, loads and stores included.
    # down, up: TCP over the air, 20 Mbit/s (Espressif, ESP-IDF programming guide, Wi-Fi driver).
    # memory: all of the RAM.
    # watts: all three are assumptions.
    "microcontroller": Device(240e6, 20e6, 20e6, 2**20, watts=0.5, down_watts=0.5, up_watts=0.7),
}
