"""Who is asking: from a request to its tenant."""

from fastapi import Request

from gradstream.shared.ids import LOCAL_TENANT, TenantId


def tenant_of(_request: Request) -> TenantId:
    """The tenant of a request. Every key belongs to the local tenant until keys are managed."""
    return LOCAL_TENANT
