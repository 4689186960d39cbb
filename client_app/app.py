"""The ClientApp that Flower starts: it passes each message on to the site's service.

Where there is no service, the handlers run here. A deployed site names its service's socket:
``--node-config 'service="/run/archipelago/site.sock"'`` (:mod:`client_app.service`). Then nothing
but Flower and the framing of requests is imported, and this process, whose code the server ships,
needs to read neither data nor keys.
"""

from logging import ERROR, WARNING

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client_app.framing import RAISED, request
from client_app.node import NodeError, check_node
from configuration.flower import log


class Site(ClientApp):
    """The ClientApp of a site, which answers every message, whatever goes wrong."""

    def __call__(self, message: Message, context: Context) -> Message:
        """The service's answer, or that of the handlers in this process."""
        try:
            check_node(context.node_config)
        except NodeError as error:
            log(ERROR, "%s", error)
            return Message(Error(RAISED, f"NodeError: {error}"), reply_to=message)
        if "service" in context.node_config:
            return request(str(context.node_config["service"]), message, context)
        if message.metadata.message_type == "query.site" and "site" in context.node_config:
            log(
                WARNING,
                "this site has no service: code that the server ships reads its data and keys "
                "(docs/how-to/site.md)",
            )
        # Not above: with a service this process loads no torch.
        from client_app.handlers import app as handlers

        return handlers(message, context)


app = Site()
