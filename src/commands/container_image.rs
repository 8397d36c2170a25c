//! Images for what runs containers: what an image says of itself, found before its layers are. In: the arguments that name it. Out: its
//! manifest and configuration, and the same arguments with a name that means the same image later.

use super::UsageError;
use super::attach::AttachRequest;
use super::cli::{DeviceArgs, LayerArgs};
use super::layer::{Bar, small_cache};
use super::{Session, attach};
use crate::open::Prepared;
use crate::source::Source;
use crate::source::registry::{self, Image, ImageName, LayoutName, Reference, RegistryOptions, Version};

/// An image whose manifest and configuration are here.
pub(super) struct ContainerImage {
    pub(super) image: Image,
    /// As it was named, readable in any directory.
    pub(super) source: String,
    /// The arguments, with a name that leads to this image whatever becomes of its tag.
    pub(super) layer: LayerArgs,
}

impl ContainerImage {
    /// Finds it. `command` is what wants an image, for messages.
    ///
    /// # Errors
    /// When it is no image, or cannot be had.
    pub(super) fn find(layer: &LayerArgs, command: &str, session: Session) -> anyhow::Result<Self> {
        let Source::Image(name) = Source::parse(&layer.source)? else {
            let typed = crate::http::without_secrets(&layer.source);
            let why =
                format!("{typed}: {command} takes images: docker://HOST/NAME[:TAG|@DIGEST], oci:DIR[:TAG|@DIGEST]");
            return Err(UsageError(why).into());
        };
        if layer.layer.is_some() {
            return Err(UsageError(format!("--layer: {command} takes whole images")).into());
        }
        let options = RegistryOptions {
            cache: small_cache(layer)?,
            ..layer.registry.options()?
        };
        let waits = Bar::new(session.talk);
        let found = registry::find(&name, &options)?;
        if let Some(why) = found.recalled().and_then(|recalled| recalled.because.as_ref()) {
            log::warn!("{name} is what it was the last time that it was asked for: {why}");
        }
        let config = found.config()?;
        drop(waits);
        let image = found.with(config);
        let source = attach::from_anywhere(&layer.source, &image.name);
        let same = match name {
            ImageName::Registry(reference) => ImageName::Registry(Reference {
                version: Version::Digest(image.manifest_digest.clone()),
                ..reference
            }),
            // Of its manifests a layout names only the topmost.
            ImageName::Layout(layout) => ImageName::Layout(LayoutName {
                dir: std::path::absolute(&layout.dir)?,
                ..layout
            }),
        };
        Ok(Self {
            image,
            source,
            layer: LayerArgs {
                source: same.to_string(),
                ..layer.clone()
            },
        })
    }

    /// Finds its layers, each with its index, and writes down what the service must know of them.
    ///
    /// # Errors
    /// When they cannot be had.
    pub(super) fn request(
        &self,
        device: &DeviceArgs,
        fetch_all: bool,
        session: Session,
    ) -> anyhow::Result<(Prepared, AttachRequest)> {
        let prepared = super::layer::prepare(&self.layer, session)?;
        let request = attach::request(&prepared, self.source.clone(), &self.layer, device, fetch_all)?;
        Ok((prepared, request))
    }
}
