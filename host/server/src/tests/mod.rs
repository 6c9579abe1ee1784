//! The routers against fakes: what a client sees, and what the ports were asked.

mod admin;
mod cache;
mod demand;
mod door;
mod embeddings;
mod entry;
mod errors;
mod explain;
mod generation;
mod http2;
mod keys;
mod messages;
mod places;
mod progressive;
mod responses;
mod routing;
mod tls;
