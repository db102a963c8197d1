"""How Ray Serve chooses a replica for a request: by `compress.runtime.server.affinity`.

Relied on, of Ray 2.60's interface for routers (`ray.serve.request_router`, public, alpha):
`choose_replicas` returns lists of replicas, best first, and the next list is tried when no replica
of the one before takes the request; a replica that has died is not among the candidates; the number
of requests that each is busy with is in `replica_queue_len_cache`, None when nothing was heard for
a while.  The key comes as the handle's `session_id`, and what was tried already as the argument
`tried` of the call.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from compress.runtime.server.affinity import busy_last, in_order


class PrefixRouter(RequestRouter):
    """The replica that has seen the prefix, unless it is overloaded or has refused."""

    # Seconds.  A replica may be slow to answer when its cores are busy, and is alive all the same.
    queue_len_response_deadline_s = 2.0
    max_queue_len_response_deadline_s = 10.0

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All replicas, one a rank, in the order in which they should be asked."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # wait before asking all again
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        tried = pending_request.kwargs.get("tried", ())
        names = [name for name in by_name if name not in tried] or list(by_name)
        loads = {name: self._load(by_name[name]) for name in names}
        key = pending_request.metadata.session_id or pending_request.metadata.internal_request_id
        return [[by_name[name]] for name in busy_last(in_order(key, names), loads)]

    def _load(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
