//! What routers see and what their answers come to.
