"""The rival of the submit figures: a FastAPI handler on the same server software that reads the body and answers. Nothing else.

Run by bench.edge: python -m bench.edge_raw --port PORT
"""

import argparse

import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()


@app.post("/api/v1/forward_backward")
async def read_body(request: Request) -> Response:
    """As many bytes in, as many out as the server's own answer has."""
    await request.body()
    return Response(b'{"request_id":"5f1c2a90:train:0:1","model_id":"5f1c2a90:train:0"}', media_type="application/json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=options.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_config=None,
    )


if __name__ == "__main__":
    main()
