"""What a worker's machine is doing while it trains, under the names that MLflow shows as system metrics."""

from __future__ import annotations

import torch

MEGABYTE = 1e6


class MachineUse:
    """Read at every log line. Without psutil there are only the GPU's figures."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        try:
            import psutil
        except ImportError:
            self._psutil = None
            return
        self._psutil, self._process = psutil, psutil.Process()
        psutil.cpu_percent()
        self._network = psutil.net_io_counters()

    def read(self) -> dict[str, float]:
        """CPU and network since the last time, memory now, the GPU's memory at its peak since then."""
        found: dict[str, float] = {}
        if self._psutil is not None:
            memory, network, before = self._psutil.virtual_memory(), self._psutil.net_io_counters(), self._network
            self._network = network
            found = {
                "cpu_utilization_percentage": self._psutil.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / MEGABYTE,
                "system_memory_usage_percentage": memory.percent,
                "worker_memory_megabytes": self._process.memory_info().rss / MEGABYTE,
                "network_receive_megabytes": (network.bytes_recv - before.bytes_recv) / MEGABYTE,
                "network_transmit_megabytes": (network.bytes_sent - before.bytes_sent) / MEGABYTE,
            }
        if self.device.type == "cuda":
            found["gpu_peak_memory_megabytes"] = torch.cuda.max_memory_allocated(self.device) / MEGABYTE
            torch.cuda.reset_peak_memory_stats(self.device)
            _, total = torch.cuda.mem_get_info(self.device)
            found["gpu_peak_memory_percentage"] = 100 * found["gpu_peak_memory_megabytes"] * MEGABYTE / total
        return {f"system/{name}": value for name, value in found.items()}
