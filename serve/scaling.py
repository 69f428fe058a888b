"""How many replicas a deployment needs. Runs in Serve's controller, which gets this module by value: it imports nothing
of ours.
"""

from __future__ import annotations

import math
from typing import Any

#: What the AR's replicas record (`record_autoscaling_stats`): plans that wait until they may go on.
PAUSED = "paused"


def replicas_for_work(context: Any) -> tuple[int, dict[str, Any]]:
    """Enough that `target_ongoing_requests` calls come to each replica; of calls that wait, none.

    A call of the DiT or the decoder is one segment, at work or in the queue before it. A call of the AR is a whole
    plan, which is far ahead of the DiT most of the time, and then no work: it counts only while it may go on. Bounds
    and delays are applied by Serve.
    """
    paused = sum(context.aggregated_metrics.get(PAUSED, {}).values())
    work = max(0.0, context.total_num_requests - paused)
    # averages over a time: a trace of something that is over is nothing
    return math.ceil(work / context.config.get_target_ongoing_requests() - 0.05), {}
