//! Certificates of the two planes: the files that the configuration names, read at the start and again at SIGHUP.
//!
//! Chain and key are read and tried together, and take the place of the old ones as one value, or not at all.

use std::path::PathBuf;
use std::sync::Arc;

use pointsman_server::{Tls, TlsError, Validity, validity};
use serde::{Deserialize, Serialize};

use crate::files::{self, FileError};

/// TLS of a plane.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TlsSection {
    /// PEM file with the chain, the host's own certificate first; empty for no TLS.
    pub cert_file: PathBuf,
    /// PEM file with its key.
    pub key_file: PathBuf,
}

/// Why a plane cannot speak TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertificateError {
    #[error("{section}.tls needs both `cert_file` and `key_file`, or neither")]
    Half { section: &'static str },
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{cert} and {key}: {source}")]
    Unusable { cert: PathBuf, key: PathBuf, source: TlsError },
}

/// A plane's certificate and where it comes from.
#[derive(Clone, Debug)]
pub(crate) struct Certificate {
    files: TlsSection,
    pub(crate) tls: Arc<Tls>,
    /// When all of the chain was valid that was read first; none where it does not say it in a way that is known.
    pub(crate) valid: Option<Validity>,
}

// === impl TlsSection ===

impl TlsSection {
    /// Both files or none.
    ///
    /// # Errors
    /// One of them.
    pub(crate) fn check(&self, section: &'static str) -> Result<(), CertificateError> {
        match self.cert_file.as_os_str().is_empty() == self.key_file.as_os_str().is_empty() {
            true => Ok(()),
            false => Err(CertificateError::Half { section }),
        }
    }

    /// Reads the files; none where there are none.
    ///
    /// # Errors
    /// They cannot be read or used.
    pub(crate) fn load(&self) -> Result<Option<Certificate>, CertificateError> {
        if self.cert_file.as_os_str().is_empty() {
            return Ok(None);
        }
        let (chain, key) = self.read()?;
        let tls = Tls::new(&chain, &key).map_err(|source| self.unusable(source))?;
        let valid = validity(&chain);
        Ok(Some(Certificate { files: self.clone(), tls: Arc::new(tls), valid }))
    }

    fn read(&self) -> Result<(Vec<u8>, Vec<u8>), CertificateError> {
        Ok((files::read(&self.cert_file)?, files::read_secret(&self.key_file)?))
    }

    fn unusable(&self, source: TlsError) -> CertificateError {
        CertificateError::Unusable { cert: self.cert_file.clone(), key: self.key_file.clone(), source }
    }
}

// === impl Certificate ===

impl Certificate {
    /// Reads the files again; connections to come get what is in them, which is valid as said.
    ///
    /// # Errors
    /// They cannot be read or used, and the certificate stays what it was.
    pub(crate) fn reload(&self) -> Result<Option<Validity>, CertificateError> {
        let (chain, key) = self.files.read()?;
        self.tls.replace(&chain, &key).map_err(|source| self.files.unusable(source))?;
        Ok(validity(&chain))
    }
}
