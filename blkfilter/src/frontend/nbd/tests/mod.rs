//! The server against raw clients: what must hold on the wire, whatever the peer sends.

mod client;
mod growing;
mod hostile;
mod late;
mod options;
mod requests;
mod serving;
