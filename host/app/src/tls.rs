//! Certificates of the two planes: the files that the configuration names, read at the start and again at SIGHUP.
//!
//! A key that everybody on the machine can read is refused, because whoever has it is this host: only its owner and its group may.
//! Chain and key are read and tried together, and take the place of the old ones as one value, or not at all.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pointsman_server::{Tls, TlsError};
use serde::{Deserialize, Serialize};

/// Largest file; a long chain has some 10 KiB.
const MAX_FILE: u64 = 1 << 20;

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
    #[error("{path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} exceeds {MAX_FILE} bytes, and is no certificate or key")]
    TooLarge { path: PathBuf },
    #[error(
        "{path} can be read by everybody on this machine: a private key is for its owner and its group, as after `chmod o= {path}`"
    )]
    Open { path: PathBuf },
    #[error("{cert} and {key}: {source}")]
    Unusable { cert: PathBuf, key: PathBuf, source: TlsError },
}

/// A plane's certificate and where it comes from.
#[derive(Clone, Debug)]
pub(crate) struct Certificate {
    files: TlsSection,
    pub(crate) tls: Arc<Tls>,
}

fn read(path: &Path, is_secret: bool) -> Result<Vec<u8>, CertificateError> {
    let fault = |source| CertificateError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(fault)?;
    if is_secret && file.metadata().map_err(fault)?.mode() & 0o007 != 0 {
        return Err(CertificateError::Open { path: path.to_owned() });
    }
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(fault)?;
    if text.len() as u64 > MAX_FILE {
        return Err(CertificateError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
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
        Ok(Some(Certificate { files: self.clone(), tls: Arc::new(tls) }))
    }

    fn read(&self) -> Result<(Vec<u8>, Vec<u8>), CertificateError> {
        Ok((read(&self.cert_file, false)?, read(&self.key_file, true)?))
    }

    fn unusable(&self, source: TlsError) -> CertificateError {
        CertificateError::Unusable { cert: self.cert_file.clone(), key: self.key_file.clone(), source }
    }
}

// === impl Certificate ===

impl Certificate {
    /// Reads the files again; connections to come get what is in them.
    ///
    /// # Errors
    /// They cannot be read or used, and the certificate stays what it was.
    pub(crate) fn reload(&self) -> Result<(), CertificateError> {
        let (chain, key) = self.files.read()?;
        self.tls.replace(&chain, &key).map_err(|source| self.files.unusable(source))
    }
}
