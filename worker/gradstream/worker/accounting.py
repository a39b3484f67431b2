"""How much disk each tenant's saves take, written down for the API."""

from collections import defaultdict
from dataclasses import dataclass

from gradstream.shared.joblog.port import RecordKind
from gradstream.worker.sweeps import Parts

# No tenant can have this name: tenants begin with a letter or digit.
TOTAL = ".total"
_OWN = "."


@dataclass(slots=True)
class Usage:
    """What one tenant's saves take."""

    num_checkpoints: int = 0
    checkpoint_bytes: int = 0
    num_snapshots: int = 0
    snapshot_bytes: int = 0

    def fields(self, *, now_ms: int) -> dict[str, str]:
        return {
            "num_checkpoints": str(self.num_checkpoints),
            "checkpoint_bytes": str(self.checkpoint_bytes),
            "num_snapshots": str(self.num_snapshots),
            "snapshot_bytes": str(self.snapshot_bytes),
            "measured_ms": str(now_ms),
        }


async def account_storage(parts: Parts, *, limit_bytes: int) -> int:
    """Write a storage record for each tenant that has saves, and one for the whole server; how many tenants.

    storage:TENANT counts named checkpoints and ephemeral snapshots. storage:.total has used_bytes of everything below output_dir,
    which is what limit_bytes (storage_limit) bounds.
    """
    usages: dict[str, Usage] = defaultdict(Usage)
    total = Usage()
    for manifest in parts.storage.checkpoints():
        for usage in (usages[manifest.tenant], total):
            usage.num_checkpoints += 1
            usage.checkpoint_bytes += manifest.size_bytes
    for manifest in parts.storage.samplers():
        for usage in (usages[manifest.tenant], total):
            usage.num_snapshots += 1
            usage.snapshot_bytes += manifest.size_bytes
    for tenant, usage in usages.items():
        fields = {"tenant": tenant, **usage.fields(now_ms=parts.now_ms)}
        await parts.intake.put_record(RecordKind.STORAGE, tenant, fields)
    sums = {"used_bytes": str(parts.storage.used_bytes()), "limit_bytes": str(limit_bytes)}
    await parts.intake.put_record(RecordKind.STORAGE, TOTAL, {**sums, **total.fields(now_ms=parts.now_ms)})
    for tenant, _ in parts.census.records(RecordKind.STORAGE):
        if tenant not in usages and not tenant.startswith(_OWN):
            parts.census.remove(RecordKind.STORAGE, tenant)
    return len(usages)
