//! The admin plane: shapes and protections.
