//! How components come in: uploaded, pulled from a registry, or named in the configuration. Each is checked against the key
//! ring by its digest before a byte of it is parsed, then admitted (compiled) beside everything else, then kept.

use std::path::Path;
use std::sync::TryLockError;

use pointsman_control::{ComponentRef, Happened};
use pointsman_policy::{Component, Digest};
use pointsman_server::admin::wire;
use pointsman_server::ports::{AdminError, Upload, Uploaded};

use super::errors::{
    busy, conflict, internal, invalid, not_found, pull_error, reference_error, trust_error, upload_error,
};
use super::{Deploy, Known, lock};
use crate::oci;
use crate::reference::{OCI_SCHEME, Reference};
use crate::trust::{Signature, TrustError};

/// Most uploaded components on disk.
const MAX_COMPONENTS: usize = 256;
/// Largest component that is pulled; what is uploaded has the same limit.
const MAX_PULL_BYTES: u64 = 32 << 20;

/// A component on its way in.
pub(super) struct Offered {
    bytes: Vec<u8>,
    signature: Option<Signature>,
    /// Where the host got it, when it was not in the request.
    source: Option<String>,
}

/// One that is compiled and trusted, and not kept yet.
pub(super) struct Admitted {
    offered: Offered,
    component: Component,
    signed_by: Option<String>,
}

// === impl Offered ===

impl Offered {
    /// An upload, with the signature of its header.
    pub(super) fn uploaded(upload: Upload) -> Result<Self, AdminError> {
        let signature = upload.signature.map(|text| Signature::parse(text.as_bytes())).transpose();
        Ok(Self { bytes: upload.bytes, signature: signature.map_err(trust_error)?, source: None })
    }

    /// A file, with the signature beside it where there is one.
    fn file(path: &str) -> Result<Self, AdminError> {
        let bytes =
            std::fs::read(path).map_err(|e| not_found(format!("no built-in component and no file `{path}`: {e}")))?;
        let signature = std::fs::read(Path::new(&format!("{path}.sig"))).ok().map(|bytes| Signature::parse(&bytes));
        Ok(Self { bytes, signature: signature.transpose().map_err(trust_error)?, source: Some(path.to_owned()) })
    }
}

impl Deploy {
    /// The name of the key that signed a component, given with it or stored before.
    ///
    /// # Errors
    /// It may not be used here. Built-ins are part of the program and may.
    pub(super) fn check_trust(&self, digest: &str, given: Option<&Signature>) -> Result<Option<String>, TrustError> {
        if let Some(signature) = given {
            return self.trust.accept(digest, Some(signature));
        }
        let stored = self.store.read_signature(digest);
        if lock(&self.components).get(digest).is_none_or(|known| known.builtin.is_none()) {
            self.trust.may_work(digest, stored.as_ref())?;
        }
        Ok(stored.and_then(|signature| self.trust.signer(digest, &signature)).map(str::to_owned))
    }

    /// Checks and compiles. Takes no lock for long: an activation must not wait for somebody's upload.
    pub(super) fn admit(&self, offered: Offered, actor: &str) -> Result<Admitted, AdminError> {
        let digest = Digest::of(&offered.bytes);
        let signed_by = self.check_trust(digest.as_str(), offered.signature.as_ref()).map_err(|error| {
            self.note(actor, Happened::UploadRefused { digest: digest.to_string(), error: error.to_string() });
            trust_error(error)
        })?;
        let component = self.runtime.admit(&offered.bytes).map_err(upload_error)?;
        Ok(Admitted { offered, component, signed_by })
    }

    /// Keeps an admitted component: on disk, then listed. The caller holds `operations`.
    pub(super) fn keep(&self, admitted: Admitted, actor: &str) -> Result<Uploaded, AdminError> {
        let Admitted { offered, component, signed_by } = admitted;
        let digest = component.digest.to_string();
        let (world, package, size) = (component.world, component.package.to_string(), component.size);
        let compile_ms = if component.cached { 0.0 } else { component.compile_ms };
        let known = lock(&self.components).get(&digest).cloned();
        let uploaded = lock(&self.components).values().filter(|k| k.builtin.is_none()).count();
        if known.is_none() && uploaded >= MAX_COMPONENTS {
            return Err(conflict(format!("{MAX_COMPONENTS} components are stored already; delete one first")));
        }
        let before = known.as_ref().and_then(|k| k.signed_by.clone());
        let created = known.is_none();
        let (said, source) = (digest.clone(), offered.source);
        let happened = match signed_by.clone() {
            signed_by if created => {
                Some(Happened::Uploaded { digest: said, world: world.to_string(), size, signed_by, source })
            }
            Some(signed_by) if before.as_ref() != Some(&signed_by) => {
                Some(Happened::Signed { digest: said, signed_by })
            }
            _ => None,
        };
        let sign = || offered.signature.map_or(Ok(()), |signature| self.store.write_signature(&digest, signature));
        // Known or not: the file may have been lost.
        let write = || self.store.write_component(&digest, &offered.bytes);
        // A new one is never there without its signature; one that is known keeps the old one where this fails.
        let store = || if created { sign().and_then(|()| write()) } else { write().and_then(|()| sign()) };
        let stored = match happened {
            Some(happened) => self.deed(actor, happened, store),
            None => store(),
        };
        stored.map_err(|e| {
            if created {
                // A file that stays is nobody's.
                drop(self.store.delete_component(&digest));
            }
            let remedy = "delete a component that nobody uses, or make room in the data directory";
            internal(format!("the component cannot be stored ({e}); {remedy}"))
        })?;
        let fresh = Known {
            builtin: None,
            component: None,
            revision: None,
            summary: None,
            world,
            package: package.clone(),
            size,
            signed_by: None,
        };
        let known = Known { component: Some(component), signed_by: signed_by.clone(), ..known.unwrap_or(fresh) };
        lock(&self.components).insert(digest.clone(), known);
        let world = world.to_string();
        let component = wire::UploadedComponent { digest, world, package, size, compile_ms, signed_by };
        Ok(Uploaded { component, created })
    }

    /// Takes a signature for a component that is here already. The caller holds `operations`.
    pub(super) fn sign(&self, digest: &str, signature: &[u8], actor: &str) -> Result<(), AdminError> {
        let missing = || not_found(format!("no component {digest}"));
        let known = lock(&self.components).get(digest).cloned().ok_or_else(missing)?;
        if let Some(name) = known.builtin {
            return Err(conflict(format!("{name} is built in and needs no signature")));
        }
        let signature = Signature::parse(signature).map_err(trust_error)?;
        let signer = self.trust.accept(digest, Some(&signature)).map_err(trust_error)?;
        if known.signed_by == signer && self.store.read_signature(digest) == Some(signature) {
            return Ok(());
        }
        let store = || self.store.write_signature(digest, signature);
        let stored = match signer.clone() {
            Some(signed_by) => self.deed(actor, Happened::Signed { digest: digest.to_owned(), signed_by }, store),
            None => store(),
        };
        stored.map_err(|e| internal(format!("nothing was signed: the signature cannot be stored ({e})")))?;
        if let Some(known) = lock(&self.components).get_mut(digest) {
            known.signed_by = signer;
        }
        Ok(())
    }

    /// Fetches what a reference names from its registry, one at a time.
    pub(super) fn fetch(&self, reference: &str) -> Result<Offered, AdminError> {
        let Reference::Oci(reference) = reference.parse().map_err(reference_error)? else {
            return Err(invalid(format!("`{reference}` is not a registry reference: oci://host/repository:tag")));
        };
        let _one = match self.pulling.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(busy("another component is being pulled; try again")),
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Ok(guard) => guard,
        };
        let pulled =
            oci::pull(&reference, self.registries.get(&reference.registry), MAX_PULL_BYTES).map_err(pull_error)?;
        let signature = pulled.signature.map(|text| Signature::parse(text.as_bytes())).transpose();
        let signature = signature.map_err(trust_error)?;
        Ok(Offered { bytes: pulled.bytes, signature, source: Some(pulled.source) })
    }

    /// A component as the admin API names one: a digest, `native` or a place in a registry, which is pulled now.
    pub(super) fn component_of(&self, name: &str, actor: &str) -> Result<ComponentRef, AdminError> {
        if !name.starts_with(OCI_SCHEME) {
            return Ok(name.to_owned().into());
        }
        Ok(ComponentRef::Digest(self.take_in(self.fetch(name)?, actor)?.component.digest))
    }

    /// Admits, then keeps.
    pub(super) fn take_in(&self, offered: Offered, actor: &str) -> Result<Uploaded, AdminError> {
        let admitted = self.admit(offered, actor)?;
        let _one = lock(&self.operations);
        self.keep(admitted, actor)
    }

    /// A component from a configuration: also a built-in's name or a path. The caller holds `operations`.
    pub(super) fn resolve(&self, name: &str) -> Result<ComponentRef, AdminError> {
        let (component, offered) = self.look_up(name)?;
        if let Some(offered) = offered {
            self.keep(self.admit(offered, "startup")?, "startup")?;
        }
        Ok(component)
    }

    /// What a configuration names, with its bytes where the host may not have them.
    pub(super) fn look_up(&self, name: &str) -> Result<(ComponentRef, Option<Offered>), AdminError> {
        let offered = match name.parse().map_err(reference_error)? {
            Reference::Native => return Ok((ComponentRef::Native, None)),
            Reference::Digest(digest) => return Ok((ComponentRef::Digest(digest.to_string()), None)),
            Reference::Oci(_) => self.fetch(name)?,
            Reference::Named { name, pin } => {
                let builtin =
                    lock(&self.components).iter().find(|(_, k)| k.builtin == Some(&*name)).map(|(d, _)| d.clone());
                let offered = builtin.is_none().then(|| Offered::file(&name)).transpose()?;
                let found = offered.as_ref().map(|offered| Digest::of(&offered.bytes).to_string()).or(builtin);
                let found = found.unwrap_or_default();
                if let Some(pin) = pin.filter(|pin| pin.as_str() != found) {
                    return Err(invalid(format!("`{name}` is pinned to {pin} and has the digest {found}")));
                }
                return Ok((ComponentRef::Digest(found), offered));
            }
        };
        Ok((ComponentRef::Digest(Digest::of(&offered.bytes).to_string()), Some(offered)))
    }
}
