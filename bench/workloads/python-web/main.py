"""A web service as they are: little memory, many imports, a database, uvicorn with uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import urllib.request
from collections.abc import AsyncIterator

import httpx  # noqa: F401  (what such a service imports)
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Listing(BaseModel):
    names: list[str]


engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})


def request_checkpoint() -> None:
    request = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            print(response.read().decode(), flush=True)
    except http.client.RemoteDisconnected:
        pass  # a copy


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(Item(id=number, name=f"item {number}") for number in range(1000))
        session.commit()
    listing()
    await asyncio.to_thread(request_checkpoint)
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/answer")
def listing() -> Listing:
    with Session(engine) as session:
        return Listing(names=list(session.scalars(select(Item.name).where(Item.id % 100 == 0))))


if __name__ == "__main__":
    uvicorn.run(app, host="0.0.0.0", port=8000, log_level="warning")
