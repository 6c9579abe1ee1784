//! What went wrong with a deployment, in the words and classes of the admin plane; the one place that maps them.

use pointsman_control::PlanError;
use pointsman_policy::{ActivateError, UploadError};
use pointsman_server::ports::{AdminError, AdminErrorKind};

use crate::oci::PullError;
use crate::reference::ReferenceError;
use crate::trust::TrustError;

pub(super) fn admin_error(kind: AdminErrorKind, message: String) -> AdminError {
    AdminError { kind, message, param: None }
}

pub(super) fn invalid(message: String) -> AdminError {
    admin_error(AdminErrorKind::Invalid, message)
}

pub(super) fn not_found(message: String) -> AdminError {
    admin_error(AdminErrorKind::NotFound, message)
}

pub(super) fn conflict(message: String) -> AdminError {
    admin_error(AdminErrorKind::Conflict, message)
}

pub(super) fn busy(message: &str) -> AdminError {
    admin_error(AdminErrorKind::Busy, message.to_owned())
}

pub(super) fn internal(message: String) -> AdminError {
    admin_error(AdminErrorKind::Internal, message)
}

pub(super) fn plan_error(error: PlanError) -> AdminError {
    let kind = match &error {
        PlanError::NoSlot(_) => AdminErrorKind::NotFound,
        PlanError::NamespaceOfSlot { .. } => AdminErrorKind::Invalid,
        PlanError::Stale { .. }
        | PlanError::NothingBefore(_)
        | PlanError::TooManySlots { .. }
        | PlanError::RollingOut { .. } => AdminErrorKind::Conflict,
    };
    admin_error(kind, error.to_string())
}

pub(super) fn upload_error(error: UploadError) -> AdminError {
    let kind = match &error {
        UploadError::TooLarge { .. } => AdminErrorKind::TooLarge,
        error if error.is_busy() => AdminErrorKind::Busy,
        error if error.is_host_fault() => AdminErrorKind::Internal,
        _ => AdminErrorKind::Invalid,
    };
    admin_error(kind, error.to_string())
}

pub(super) fn trust_error(error: TrustError) -> AdminError {
    let kind = match &error {
        TrustError::BadSignature { .. } => AdminErrorKind::Invalid,
        _ => AdminErrorKind::Refused,
    };
    AdminError { param: Some("signature".into()), ..admin_error(kind, error.to_string()) }
}

pub(super) fn reference_error(error: ReferenceError) -> AdminError {
    AdminError { param: Some("component".into()), ..invalid(error.to_string()) }
}

pub(super) fn pull_error(error: PullError) -> AdminError {
    let kind = match &error {
        PullError::Missing(_) => AdminErrorKind::NotFound,
        PullError::TooLarge { .. } => AdminErrorKind::TooLarge,
        PullError::Layers { .. }
        | PullError::Digest { .. }
        | PullError::Credentials(_)
        | PullError::WrongCredentials { .. } => AdminErrorKind::Refused,
        PullError::File { .. } => AdminErrorKind::Internal,
        _ => AdminErrorKind::Upstream,
    };
    AdminError { param: Some("component".into()), ..admin_error(kind, error.to_string()) }
}

pub(super) fn activate_error(error: ActivateError) -> AdminError {
    let (kind, param) = match &error {
        ActivateError::UnknownSlot { .. } => (AdminErrorKind::NotFound, "slot"),
        ActivateError::WrongWorld { .. } => (AdminErrorKind::Invalid, "component"),
        ActivateError::ConfigTooLarge { .. } => (AdminErrorKind::TooLarge, "config"),
        ActivateError::Refused { .. } => (AdminErrorKind::Refused, "config"),
        ActivateError::Budget(_) => (AdminErrorKind::Invalid, "budget"),
        ActivateError::NotHandedOver { .. } => (AdminErrorKind::Refused, "handover"),
        ActivateError::NotClosable { .. } => (AdminErrorKind::Invalid, "on_fault"),
        ActivateError::NoNamespace => (AdminErrorKind::Conflict, "state_namespace"),
        _ => (AdminErrorKind::Refused, "component"),
    };
    AdminError { param: Some(param.into()), ..admin_error(kind, error.to_string()) }
}
