"""The front replica: it speaks HTTP, decodes pictures and draws masks, and asks model replicas for the rest."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import ray
import stamina
import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.job_submission import JobSubmissionClient
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from rlfseg.config import ServeConfig
from serve.api import build_api
from serve.batches import Batches
from serve.catalog import Catalog
from serve.guard import Keys
from serve.messages import Answer, Ask
from serve.meters import Meters
from serve.refusal import Refusal
from serve.work import Work

log = logging.getLogger("ray.serve")
PROBE_S = 1.0  # as long as load balancers wait for an answer
GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)


class ModelClient:
    """A front replica's way to the model replicas.

    Args:
        handle: Of the model deployment.
    """

    def __init__(self, handle: DeploymentHandle[Any]):
        self.handle, self.answered = handle, False

    async def ask(self, name: str, ask: Ask) -> Answer:
        """Asks a model; a caller that is cancelled gives up its place.

        Args:
            name: Of the model.
            ask: A picture and its phrases.

        Returns:
            The answer.

        Raises:
            Refusal: The queue is full, the replica died, or the network failed.
        """
        response: Any = self.handle.options(multiplexed_model_id=name).segment.remote(name, ask)
        try:
            answer: Answer | Refusal = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise Refusal("overloaded", "too many pictures are waiting; ask again later") from None
        except GONE:
            self.answered = False
            raise Refusal("lost", "the replica that worked on this is gone; ask again") from None
        self.answered = True
        if isinstance(answer, Refusal):
            raise answer
        return answer

    async def ready(self) -> bool:
        """Whether a model has answered since the last one was lost; one that is busy may take long to answer again."""
        if self.answered:
            return True
        response: Any = self.handle.ready.remote()
        try:
            async with asyncio.timeout(PROBE_S):
                await response
        except BackPressureError:
            pass  # busy is ready
        except (TimeoutError, *GONE):
            response.cancel()
            return False
        self.answered = True
        return True


@serve.ingress()
class Front:
    """The deployment that speaks HTTP.

    Args:
        config: Settings of the service.
        model: Handle of the model deployment.
    """

    def __init__(self, config: ServeConfig, model: DeploymentHandle[Any]):
        self.config, self.model = config, ModelClient(model)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica."""
        torch.set_num_threads(1)  # pictures are worked on in parallel, not each in itself
        config, catalog, meters = self.config, Catalog(self.config.models), Meters()
        batches = Batches(config, catalog, _job_client, ray.cluster_resources) if config.batches.out else None
        if batches is not None:
            threading.Thread(target=_resume, args=[batches], daemon=True).start()
        self.api = build_api(
            config,
            catalog=catalog,
            work=Work(config, catalog, self.model.ask, meters),
            batches=batches,
            keys=Keys(config.keys_file or "") if config.auth else None,
            ready=self.model.ready,
            meters=meters,
        )
        return self.api

    async def drain(self) -> None:
        """Takes no further requests, and returns once those in work are answered."""
        await self.api.state.door.close()


def _job_client() -> JobSubmissionClient:
    try:
        return JobSubmissionClient(ray.get_runtime_context().gcs_address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        log.exception("Ray's job server can't be reached")
        raise Refusal("failed", "Ray's job server can't be reached; the server's log has the cause") from error


def _resume(batches: Batches) -> None:
    """Until Ray has taken all of them: its job server may start later than this replica, and be away for a while."""
    for attempt in stamina.retry_context(on=(Refusal, OSError), attempts=None, timeout=None, wait_max=60):
        with attempt:
            batches.resume()
