//! `tarblk ls` and `image`: what a layer holds, without a device; and opening a layer with its progress shown.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use indicatif::ProgressBar;

use super::Session;
use super::cli::{ImageArgs, LayerArgs, LsArgs, RegistryArgs};
use super::output::{Talk, write_out};
use super::replace::replace;
use super::waits::WaitTeller;
use crate::fetch::LayerRange;
use crate::http::without_secrets;
use crate::image::BlockImage as _;
use crate::image::export::export;
use crate::index::Index;
use crate::index::listing::{self, Format, ListingError, Selection};
use crate::layer::Coding;
use crate::open::{self, Cache, Fetching, OpenOptions, Opened, PackedImage, Prepared, PreparedLayer, Reading, Watch};
use crate::quantity::show_size;
use crate::source::registry::SmallBlobCache;
use crate::source::{Place, Source};
use crate::tree::listing::write_tree;
use crate::tree::{NodeId, Tree, TreeBuilder};
use crate::units::{LayerId, TarOffset, TarRange};

/// Draws how far layers are read, once it takes long enough to be noticed, and says what is waited for meanwhile.
pub(super) struct Bar {
    talk: Talk,
    drawn: Arc<OnceLock<ProgressBar>>,
    began: Instant,
    _waits: WaitTeller,
}

/// Nothing is drawn before this.
const NOTICED: Duration = Duration::from_millis(300);

impl Bar {
    pub(super) fn new(talk: Talk) -> Self {
        let drawn = Arc::new(OnceLock::new());
        Self {
            talk,
            _waits: WaitTeller::start(talk, drawn.clone()),
            drawn,
            began: Instant::now(),
        }
    }
}

impl Watch for Bar {
    fn reading(&mut self, what: Reading, at: u64, len: u64) {
        let what = match what {
            Reading::Headers => "reading headers",
            Reading::Whole => "reading",
            Reading::Download => "downloading",
        };
        let elapsed = self.began.elapsed();
        if self.drawn.get().is_none() && elapsed > NOTICED {
            let _drawn_once = self.drawn.set(self.talk.bar(what, len, elapsed));
        }
        if let Some(bar) = self.drawn.get() {
            if bar.message() != what {
                bar.set_message(what);
            }
            bar.set_position(at);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.drawn.get() {
            bar.finish_and_clear();
        }
    }
}

/// The cache directory that no option names: the environment's `TARBLK_CACHE`, or the usual one.
pub(super) fn cache_dir() -> PathBuf {
    let named = std::env::var_os("TARBLK_CACHE").filter(|dir| !dir.is_empty());
    named.map_or_else(open::default_cache_dir, PathBuf::from)
}

/// The cache that the options name, if they want one.
fn cache(args: &LayerArgs) -> anyhow::Result<Option<Cache>> {
    if args.no_cache {
        return Ok(None);
    }
    let dir = args.cache.clone().unwrap_or_else(cache_dir);
    Ok(Some(Cache::new(&dir)?.with_limit(args.cache_size)))
}

/// The same, for manifests and configurations.
pub(super) fn small_cache(args: &LayerArgs) -> anyhow::Result<Option<Arc<dyn SmallBlobCache>>> {
    let cache = cache(args)?;
    Ok(cache.map(|cache| -> Arc<dyn SmallBlobCache> { Arc::new(cache) }))
}

/// Finds a layer or an image and its indexes as the options say.
pub(super) fn prepare(args: &LayerArgs, session: Session) -> anyhow::Result<Prepared> {
    let cache = cache(args)?;
    let options = OpenOptions {
        index: args.index.clone(),
        index_digest: args.index_digest.clone(),
        trust: args.registry.trust()?,
        layer: args.layer.clone(),
        cache,
        size: args.registry.size(),
        http: args.registry.http(),
        registry: args.registry.options()?,
    };
    let prepared = open::prepare(&args.source, &options, &mut Bar::new(session.talk))?;
    for (number, layer) in (1..).zip(&prepared.layers) {
        log::info!("{}: index of layer {number}: {}", prepared.name, layer.origin);
    }
    Ok(prepared)
}

/// How what is only looked at is opened: what is read of an image's layers is kept, because it may be all of them.
pub(super) fn options_for(source: &str, registry: &RegistryArgs) -> anyhow::Result<OpenOptions> {
    let is_image = matches!(Source::parse(source)?, Source::Image(_));
    Ok(OpenOptions {
        cache: is_image.then(|| Cache::new(&cache_dir())).transpose()?,
        trust: registry.trust()?,
        size: registry.size(),
        http: registry.http(),
        registry: registry.options()?,
        ..OpenOptions::default()
    })
}

/// `tarblk ls`.
pub(super) fn ls(args: &LsArgs, session: Session) -> anyhow::Result<()> {
    let format = match (args.json, args.mtree) {
        (true, _) => Format::Json,
        (_, true) => Format::Mtree,
        _ => Format::Plain,
    };
    let options = OpenOptions {
        layer: args.layer.clone(),
        ..options_for(&args.source, &args.registry.within(args.deadline))?
    };
    let mut bar = Bar::new(session.talk);
    if let Source::Image(_) = Source::parse(&args.source)? {
        let tree = open::prepare(&args.source, &options, &mut bar)?.tree()?;
        drop(bar);
        let selection = selection(&args.paths, &tree, &args.source)?;
        return write_out(|out| write_tree(&tree, &selection, format, out));
    }
    let index = open::index_of(&args.source, &options, &mut bar)?;
    drop(bar);
    warn_of_archive(&args.source, &index)?;
    let selection = if args.paths.is_empty() {
        Selection::everything()
    } else {
        let mut tree = TreeBuilder::new();
        let built = index.replay(&mut tree);
        built.with_context(|| without_secrets(&args.source))?;
        selection(&args.paths, &tree.finish(), &args.source)?
    };
    let mut broken = None;
    write_out(|out| match listing::write_selected(&index, &selection, format, out) {
        Err(ListingError::Index(error)) => {
            broken = Some(error);
            Ok(())
        }
        Err(ListingError::Write(error)) => Err(error),
        Ok(()) => Ok(()),
    })?;
    broken.map_or(Ok(()), |error| {
        Err(anyhow::Error::new(error).context(without_secrets(&args.source)))
    })
}

/// Says that what was read as a layer is an image packed into a tar.
pub(super) fn warn_of_archive(source: &str, index: &Index<Vec<u8>>) -> anyhow::Result<()> {
    let found = PackedImage::find(source, index);
    if let Some(archive) = found.with_context(|| without_secrets(source))? {
        log::warn!("{archive}");
    }
    Ok(())
}

/// What is to be listed: each path as it was typed, and where it leads by the symbolic links on its way.
fn selection(paths: &[OsString], tree: &Tree, source: &str) -> anyhow::Result<Selection> {
    let mut selection = Selection::everything();
    for path in paths {
        let path = path.as_bytes();
        let (parent, name) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b""[..], path),
        };
        // A last link is what is asked for itself, unless a slash behind it says otherwise.
        let directory = tree.resolve(NodeId::ROOT, parent);
        let found = match name {
            b"" | b"." | b".." => tree.resolve(NodeId::ROOT, path).map(|node| tree.path(node)),
            name => directory.and_then(|directory| {
                tree.child(directory, name)?;
                let mut found = tree.path(directory);
                found.push(b'/');
                found.extend_from_slice(name);
                Some(found)
            }),
        };
        let Some(found) = found else {
            bail!("{} has no {}", without_secrets(source), path.escape_ascii());
        };
        selection.add(path);
        selection.add(&found);
    }
    Ok(selection)
}

/// `tarblk image`.
pub(super) fn image(args: &ImageArgs, session: Session) -> anyhow::Result<()> {
    let mut layer = args.layer.clone();
    layer.registry = layer.registry.within(args.deadline);
    let prepared = prepare(&layer, session)?;
    let name = prepared.name.clone();
    let payload = prepared.payload_bytes();
    let cannot = || format!("cannot write {}", args.output.display());
    // What is wrong with the layer is told before anything is written.
    let plain = |layer: &PreparedLayer| match (&layer.layer.blob.place, layer.coding()) {
        (Place::File(file), Coding::Plain) => file.open().ok(),
        _ => None,
    };
    let files: Option<Vec<File>> = prepared.layers.iter().map(plain).collect();
    let (written, len) = if let Some(files) = files {
        let image = prepared.image()?;
        let bar = session.talk.bar("writing image", payload, Duration::ZERO);
        let mut read = |layer: LayerId, at: TarOffset, buffer: &mut [u8]| {
            bar.inc(u64::try_from(buffer.len()).unwrap_or(0));
            let file = usize::try_from(layer.0).ok().and_then(|at| files.get(at));
            file.ok_or(io::ErrorKind::NotFound)?
                .read_exact_at(buffer, at.0)
                .map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))
        };
        let written = replace(&args.output, |out| export(&image, out, &mut read).with_context(cannot));
        bar.finish_and_clear();
        (written?, image.len())
    } else {
        let opened = open::serve_here(prepared, &image_fetching(args.layer.cache_size, args.deadline))?;
        let bar = session.talk.bar("writing image", payload, Duration::ZERO);
        let _waits = WaitTeller::start(session.talk, Arc::new(OnceLock::from(bar.clone())));
        let written = replace(&args.output, |out| {
            image_from_fetcher(&opened, out, &bar).with_context(cannot)
        });
        bar.finish_and_clear();
        opened.fetcher.shutdown();
        (written?, opened.image.len())
    };
    let output = args.output.display();
    session.talk.note(format_args!(
        "{output}: {} of ext4, {} of it not zero",
        show_size(len),
        show_size(written)
    ));
    Ok(())
}

/// How a whole image is fetched.
fn image_fetching(store_bytes: Option<u64>, deadline: Option<Duration>) -> Fetching {
    Fetching {
        memory_bytes: Some(256 << 20),
        connections: 4,
        fetch_all: false,
        deadline: deadline.or(Some(Duration::from_secs(300))),
        store_bytes,
    }
}

/// The image of layers that have to be brought; returns how many bytes of it are not zero.
fn image_from_fetcher(opened: &Opened, out: &File, bar: &ProgressBar) -> io::Result<u64> {
    let mut read = |layer: LayerId, at: TarOffset, buffer: &mut [u8]| {
        let range = TarRange::new(at, u64::try_from(buffer.len()).map_err(io::Error::other)?);
        let slices = opened
            .fetcher
            .read_blocking(vec![LayerRange { layer, range }])
            .map_err(io::Error::other)?;
        let mut rest = &mut buffer[..];
        for slice in &slices {
            let (head, tail) = rest
                .split_at_mut_checked(slice.len())
                .ok_or(io::ErrorKind::InvalidData)?;
            head.copy_from_slice(slice);
            rest = tail;
        }
        if !rest.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bar.inc(range.len);
        Ok(())
    };
    export(&*opened.image, out, &mut read)
}
