"""What does nats-py not do that a process must rely on?

Two things, both of which reach into it: it sends passwords over a connection that was to be encrypted and is not,
where the server does not ask for encryption; and it cannot let go of a server that does not answer any more without
waiting for it.
"""

from nats.aio.client import Client
from nats.errors import SecureConnWantedError


class NatsClient(Client):
    """A client of nats-py that insists on TLS where it was asked for, and can be dropped."""

    must_encrypt = False

    def _connect_command(self) -> bytes:
        """The first words to the server, with the password in them."""
        if self.must_encrypt and not self._server_info.get("tls_required"):
            raise SecureConnWantedError
        return super()._connect_command()

    def abort(self) -> None:
        """Close the socket now; what is unsent is lost."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
