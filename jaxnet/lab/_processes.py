"""The devices that are asked for, and the other processes of the same command."""

import contextlib

import jax

from jaxnet.contract import UserError
from jaxnet.lab._task import check_count

# Seconds without a sign of life after which JAX ends the processes that wait for another.
HEARTBEAT = 20


def join(
    devices: int | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    heeds_sigterm: bool,
) -> None:
    """Make the devices asked for, and join the other processes, before JAX starts.

    JAX takes SIGTERM as news for whoever asks, and no process ends by it: where the job does not ask, as its
    checkpoints would, JAX is told to leave the signal alone.

    Raises:
      UserError: the numbers do not fit, the processes cannot meet, or JAX cannot start.
    """
    processes = num_processes or 1
    if devices is not None:
        check_count("devices", devices)
        if devices % processes:
            raise UserError(f"devices: expected a multiple of {processes}, the number of processes, got {devices}")
        # Where JAX has started already, what it has has to do.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices // processes)
    if coordinator is not None:
        by_hand = coordinator != "auto"
        if by_hand and (num_processes is None or process_id is None):
            raise UserError("coordinator: with a host:port, --num-processes and --process-id have to be given too")
        jax.config.update("jax_enable_preemption_service", heeds_sigterm)
        try:
            jax.distributed.initialize(
                coordinator if by_hand else None,
                num_processes,
                process_id,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"coordinator: the processes cannot meet: {error}") from error
    there = len(all_devices())
    if devices is not None and there < devices:
        raise UserError(f"devices: expected 1 to {there}, which there are, got {devices}")


def all_devices() -> list[jax.Device]:
    """Those of JAX.

    Raises:
      UserError: it cannot start.
    """
    try:
        return jax.devices()
    except RuntimeError as error:
        raise UserError(f"JAX cannot start: {error}") from error
