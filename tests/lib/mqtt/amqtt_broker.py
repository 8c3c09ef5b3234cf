"""An MQTT broker of amqtt in this process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mqtt.mosquitto import free_port


@asynccontextmanager
async def amqtt_broker() -> AsyncIterator[str]:
    """Run a broker that anybody may use. Yields: its URL."""
    from amqtt.broker import Broker
    from amqtt.contexts import BrokerConfig

    port = free_port()
    config = BrokerConfig.from_dict(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    broker = Broker(config)
    await broker.start()
    try:
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        await broker.shutdown()
