//! HTTP: the OpenAI-compatible data plane, the admin plane, and everything that is text.
//!
//! The only crate with JSON wire types, tokenizers and templates. It reaches the engine, the policy slots and the models
//! through the traits in [`ports`], which the app implements: no handler knows wasmtime, a device or a file. A request's
//! way through the modules: [`serve`] accepts the connection, `data` routes it, `keys` finds the API key, `identity` says who asks, `openai` or
//! `anthropic` parses it, `admission` lets it in, `usage` writes down what it came to, [`text`] tokenizes it, `dispatch` finds its
//! replica, `stream` follows its tokens back out, or [`upstream`] sends it on to a server elsewhere, and `error` is the one place where anything that went wrong becomes a response.
//! [`entry`] is the same way without HTTP.
#![forbid(unsafe_code)]

pub mod admin;
mod admission;
mod anthropic;
mod batch;
mod cache;
mod config;
mod cors;
mod data;
mod demand;
mod dispatch;
pub mod entry;
mod error;
mod grammar;
mod held;
mod identity;
mod keys;
mod openai;
mod ops;
mod path;
mod places;
pub mod ports;
pub mod record;
mod registry;
mod serve;
mod starting;
mod state;
mod stream;
mod streams;
pub mod text;
mod tls;
mod trace;
mod unread;
pub mod upstream;
mod usage;

pub use admin::admin_router;
pub use batch::BatchConfig;
pub use config::{AdminRole, AdminToken, ConfigError, Secret, ServerConfig};
pub use data::data_router;
pub use keys::{ApiKey, BadDigest, KeyDigest, KeyLimits, check_keys, is_key_name};
pub use serve::{Listeners, Plane, ServeError, serve};
pub use starting::answer_until;
pub use state::{ServerParts, ServerState};
pub use tls::{Tls, TlsError, Validity, validity};

#[cfg(test)]
mod fakes;

#[cfg(test)]
mod tests;
