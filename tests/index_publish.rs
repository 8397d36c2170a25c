//! Indexes published beside images: made once, found in every way there is, believed only for the layer that they are of.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod scripted;

use common::anonymous::registry_options;
use common::noise::noise;
use common::packed::gzip;
use common::rawtar::RawTar;
use common::sha256;
use scripted::{Instead, TestRegistry};
use tarblk::internals::digest::Digest;
use tarblk::internals::http::HttpOptions;
use tarblk::internals::index::build::{BlobRecorder, Contents};
use tarblk::internals::index::{ColdPart, Index};
use tarblk::internals::layer::Coding;
use tarblk::internals::open::artifact::{self, ARTIFACT_TYPE, Listed, layer_tag};
use tarblk::internals::open::discover::{FoundBy, fetch_hot, find_indexes, hot_digest, is_pinned};
use tarblk::internals::open::publish::{Publication, Published, PushOptions, copy, push};
use tarblk::internals::open::{
    Cache, IndexChoice, IndexOrigin, OpenError, OpenOptions, Prepared, TrustPolicy, Unwatched, prepare,
};
use tarblk::internals::source::SourceError;
use tarblk::internals::source::registry::{
    Image, ImageName, OCI_MANIFEST, Reference, Registry, RegistryOptions, Version, resolve,
};

const SPACING: u64 = 64 << 10;

fn options() -> RegistryOptions {
    registry_options(2)
}

/// A tar with a text of many lines in it and something that does not compress.
fn tar(seed: u64) -> Vec<u8> {
    let lines: Vec<String> = (0..20_000).map(|n| format!("line {n} of layer {seed}\n")).collect();
    RawTar::new()
        .dir(b"etc/")
        .file(b"etc/text", lines.concat().as_bytes())
        .file(b"etc/noise", &noise(100_000, seed))
        .end()
        .0
}

/// A layer: its tar and its blob.
struct Layer {
    tar: Vec<u8>,
    blob: Vec<u8>,
    media_type: &'static str,
}

impl Layer {
    fn plain(seed: u64) -> Self {
        let tar = tar(seed);
        Self {
            blob: tar.clone(),
            tar,
            media_type: "application/vnd.oci.image.layer.v1.tar",
        }
    }

    fn gzip(seed: u64) -> Self {
        let tar = tar(seed);
        Self {
            blob: gzip(&tar),
            tar,
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
        }
    }

    fn digest(&self) -> Digest {
        sha256(&self.blob)
    }

    /// Its index as anybody makes it who has the blob.
    fn index(&self) -> Vec<u8> {
        let mut recorder = BlobRecorder::new(Coding::of_bytes(&self.blob), SPACING, Contents::FULL);
        self.blob.chunks(10_000).for_each(|piece| recorder.feed(piece).unwrap());
        recorder.finish().unwrap().into_index()
    }

    fn listed(&self) -> Listed {
        list(&self.index(), &self.digest())
    }
}

fn list(index: &[u8], layer: &Digest) -> Listed {
    let open = Index::open(index).unwrap();
    Listed {
        layer: layer.clone(),
        digest: sha256(index),
        size: open.file_len(),
        hot: Some((open.hot_len(), hot_digest(&open))),
        signatures: Vec::new(),
    }
}

/// Puts an image of these layers into a registry.
fn put_image(registry: &TestRegistry, name: &str, layers: &[&Layer]) -> Reference {
    let put: Vec<_> = layers
        .iter()
        .map(|layer| (&*layer.tar, &*layer.blob, layer.media_type))
        .collect();
    registry.put_image(name, "latest", &put);
    reference(registry, name)
}

fn reference(registry: &TestRegistry, name: &str) -> Reference {
    Reference::parse(&format!("{}/{name}:latest", registry.host())).unwrap()
}

/// How an index was found, and what fetching its hot part brought.
type Found<E> = (FoundBy, Result<Index<Vec<u8>>, E>);

/// What a reader of the image does.
struct Reader {
    image: Image,
    registry: Registry,
}

impl Reader {
    fn new(reference: &Reference) -> Self {
        let name = ImageName::Registry(reference.clone());
        Self {
            image: resolve(&name, &options()).unwrap(),
            registry: Registry::new(reference, &options()).unwrap(),
        }
    }

    /// How each layer's index is found, and what fetching it brings.
    fn find(&self, pin: Option<&Digest>) -> Vec<Option<Found<OpenError>>> {
        let found = find_indexes(&self.registry, &self.image, pin, &TrustPolicy::of_registry()).unwrap();
        let fetch = |(layer, found): (_, Option<_>)| {
            found.map(|found: tarblk::internals::open::discover::FoundIndex| {
                (found.by, fetch_hot(layer, &found, &HttpOptions::default()))
            })
        };
        self.image.layers.iter().zip(found).map(fetch).collect()
    }

    /// The only layer's.
    fn find_one(&self) -> Option<Found<String>> {
        let found = self.find(None).pop().unwrap();
        found.map(|(by, index)| (by, index.map_err(|error| error.to_string())))
    }
}

/// Indexes are made also of layers that have one.
fn anew(spacing: u64) -> PushOptions {
    PushOptions {
        anew: true,
        ..PushOptions::new(spacing)
    }
}

fn pushed(image: &Reference) -> Publication {
    push(image, &options(), &PushOptions::new(SPACING), &mut Unwatched).unwrap()
}

fn outcomes(publication: &Publication) -> Vec<Published> {
    publication.layers.iter().map(|(_, how, _)| *how).collect()
}

#[test]
fn what_was_pushed_is_found_in_one_request_a_layer() {
    let (one, two) = (Layer::gzip(1), Layer::plain(2));
    let mut artifacts = Vec::new();
    for api in [true, false] {
        let registry = TestRegistry::start();
        registry.rules(|rules| rules.referrers_api = api);
        let image = put_image(&registry, "some/image", &[&one, &two]);
        assert!(
            Reader::new(&image)
                .find(None)
                .iter()
                .flatten()
                .all(|(by, index)| *by == FoundBy::Header && index.is_err())
        );
        let publication = pushed(&image);
        assert_eq!(outcomes(&publication), [Published::Made; 2]);
        artifacts.push(publication.artifact.clone().unwrap());

        let reader = Reader::new(&image);
        registry.take_log();
        let found = reader.find(None);
        let asked = registry.take_log();
        for (found, layer) in found.iter().zip([&one, &two]) {
            let (by, index) = found.as_ref().unwrap();
            let index = index.as_ref().unwrap();
            // The same as who makes it from the blob alone.
            let (made, listed) = (layer.index(), layer.listed());
            let made = Index::open(made).unwrap();
            assert_eq!((*by, index.hot_digest()), (FoundBy::Image, made.hot_digest()));
            assert!(is_pinned(index, &listed.hot.clone().unwrap().1) && is_pinned(&made, &listed.digest));
            assert!(!is_pinned(index, &sha256(b"another")));
            assert!(index.cold().has(ColdPart::Headers) && index.chunk_digests().is_some());
            let path = format!("/v2/some/image/blobs/{}", listed.digest);
            let requests: Vec<_> = asked.iter().filter(|asked| asked.path == path).collect();
            assert_eq!(requests.len(), 1, "{requests:?}");
            let range = format!("bytes=0-{}", index.hot_len() - 1);
            assert_eq!(requests[0].headers["range"], range);
        }
        // Again it is all there, and nothing is read.
        let again = pushed(&image);
        assert_eq!(outcomes(&again), [Published::Kept; 2]);
        assert_eq!(again.artifact, publication.artifact);
        let layers = registry.take_log();
        let blob = format!("/v2/some/image/blobs/{}", one.digest());
        assert!(!layers.iter().any(|asked| asked.method == "GET" && asked.path == blob));
        // Pinned, the registry is not asked what refers to the image.
        let artifact = publication.artifact.unwrap();
        registry.take_log();
        assert!(
            reader
                .find(Some(&artifact))
                .iter()
                .all(|found| found.as_ref().unwrap().1.is_ok())
        );
        assert!(!registry.take_log().iter().any(|asked| asked.path.contains("referrers")));
        let wrong = find_indexes(
            &reader.registry,
            &reader.image,
            Some(&sha256(b"another")),
            &TrustPolicy::default(),
        );
        assert!(wrong.unwrap_err().is_absence());
        let manifest = find_indexes(
            &reader.registry,
            &reader.image,
            Some(&reader.image.manifest_digest),
            &TrustPolicy::default(),
        );
        assert!(manifest.unwrap_err().to_string().contains(ARTIFACT_TYPE));
    }
    assert_eq!(artifacts[0], artifacts[1], "nothing in it is of the place or the time");
}

#[test]
fn images_that_share_a_layer_share_its_index() {
    let registry = TestRegistry::start();
    let (shared, own) = (Layer::gzip(3), Layer::gzip(4));
    pushed(&put_image(&registry, "some/image", &[&shared]));
    // Another manifest in the same repository, for which nobody published anything.
    let reader = Reader::new(&put_image(&registry, "some/image", &[&shared, &own]));
    let mut found = reader.find(None).into_iter();
    let (by, index) = found.next().unwrap().unwrap();
    assert_eq!(by, FoundBy::Layer);
    assert_eq!(index.unwrap().identity().blob_digest, Some(shared.digest()));
    assert!(found.next().unwrap().is_none_or(|(_, index)| index.is_err()));
    // Publishing for that one uses it as well.
    let publication = pushed(&reference(&registry, "some/image"));
    assert_eq!(outcomes(&publication), [Published::Kept, Published::Made]);
}

#[test]
fn a_header_of_the_layers_blob_leads_to_an_index() {
    let registry = TestRegistry::start();
    let layer = Layer::gzip(5);
    let image = put_image(&registry, "some/image", &[&layer]);
    let index = registry.put_blob(&layer.index());
    let name = |index: &Digest| {
        registry.rules(|rules| {
            rules.lazy.insert(layer.digest().to_string(), index.to_string());
        });
    };
    name(&index);
    let (by, found) = Reader::new(&image).find_one().unwrap();
    assert_eq!(by, FoundBy::Header);
    assert_eq!(
        found.unwrap().hot_digest(),
        Index::open(layer.index()).unwrap().hot_digest()
    );
    // What it names is no index, or is not there.
    name(&layer.digest());
    let said = Reader::new(&image).find_one().unwrap().1.unwrap_err();
    assert!(said.contains("not a tarblk index"), "{said}");
    name(&sha256(b"gone"));
    assert!(Reader::new(&image).find_one().is_none());
}

#[test]
fn indexes_that_lie_are_refused() {
    let registry = TestRegistry::start();
    let (layer, other) = (Layer::gzip(6), Layer::gzip(7));
    let image = put_image(&registry, "some/image", &[&layer]);
    let Version::Tag(tag) = layer_tag(&layer.digest()) else {
        panic!("a tag")
    };
    let publish = |listed: &Listed, bytes: &[u8]| {
        registry.put_blob_as(&listed.digest, bytes);
        let manifest = artifact::manifest(std::slice::from_ref(listed), None);
        registry.put_manifest("some/image", &tag, OCI_MANIFEST, &manifest);
        let (by, index) = Reader::new(&image).find_one().unwrap();
        assert_eq!(by, FoundBy::Layer);
        index
    };
    let good = layer.index();
    publish(&layer.listed(), &good).unwrap();
    // Another layer's, whatever is written on it.
    let said = publish(&list(&other.index(), &layer.digest()), &other.index()).unwrap_err();
    assert!(said.contains("another layer"), "{said}");
    // Of a tar of which nobody knows whose it is.
    let mut unknown = tarblk::internals::index::IndexBuilder::new();
    let unknown = std::mem::take(&mut unknown).finish(0, tarblk::internals::index::EndOfArchive::Marked);
    let said = publish(&list(&unknown, &layer.digest()), &unknown).unwrap_err();
    assert!(said.contains("another layer"), "{said}");
    // A flipped bit in the hot part; cut short; longer than was said.
    let mut flipped = good.clone();
    flipped[300] ^= 1;
    let said = publish(&layer.listed(), &flipped).unwrap_err();
    assert!(said.contains("damaged"), "{said}");
    let cut = Listed {
        size: 200,
        hot: None,
        ..layer.listed()
    };
    let said = publish(&cut, &good[..200]).unwrap_err();
    assert!(said.contains("cut short"), "{said}");
    let longer = Listed {
        size: layer.listed().size + 1,
        ..layer.listed()
    };
    assert!(publish(&longer, &[&good[..], b"x"].concat()).is_err());
    // Another index of the same layer than the manifest names, which says nothing of its hot part.
    let mut recorder = BlobRecorder::new(Coding::of_bytes(&layer.blob), 2 * SPACING, Contents::FULL);
    recorder.feed(&layer.blob).unwrap();
    let exchanged = recorder.finish().unwrap().into_index();
    let nameless = |bytes: &[u8]| Listed {
        size: u64::try_from(bytes.len()).unwrap(),
        hot: None,
        ..layer.listed()
    };
    let said = publish(&nameless(&exchanged), &exchanged).unwrap_err();
    assert!(said.contains("damaged"), "{said}");
    publish(&nameless(&good), &good).unwrap();
    // Hot parts whose length is told wrong.
    let short = Listed {
        hot: Some((100, sha256(&good[..100]))),
        ..layer.listed()
    };
    assert!(publish(&short, &good).is_err());
    // A manifest of something else under the tag is as good as none.
    registry.put_manifest("some/image", &tag, OCI_MANIFEST, b"{}");
    assert!(
        Reader::new(&image)
            .find_one()
            .is_none_or(|(by, index)| by == FoundBy::Header && index.is_err())
    );
}

#[test]
fn a_layer_that_is_not_what_the_manifest_says_is_not_published() {
    let registry = TestRegistry::start();
    let layer = Layer::gzip(8);
    let image = put_image(&registry, "some/image", &[&layer]);
    let other = Layer::gzip(9);
    let mut blob = other.blob.clone();
    blob.resize(layer.blob.len(), 0);
    registry.put_blob_as(&layer.digest(), &blob);
    let refused = push(&image, &options(), &PushOptions::new(SPACING), &mut Unwatched).unwrap_err();
    assert!(
        matches!(refused, OpenError::Index { .. } | OpenError::Tar { .. }),
        "{refused}"
    );
    registry.take_log();
    assert!(
        Reader::new(&image)
            .find(None)
            .iter()
            .flatten()
            .all(|(_, index)| index.is_err())
    );
}

#[test]
fn indexes_are_copied_to_where_the_image_was_copied() {
    let (origin, mirror) = (TestRegistry::start(), TestRegistry::start());
    mirror.rules(|rules| rules.referrers_api = false);
    let (one, two, three) = (Layer::gzip(10), Layer::plain(11), Layer::gzip(12));
    let from = put_image(&origin, "some/image", &[&one, &two]);
    let to = put_image(&mirror, "mirror/of/image", &[&one, &two]);
    let refused = copy(&from, &to, &options(), &mut Unwatched).unwrap_err();
    let said = refused.to_string();
    assert!(
        matches!(refused, OpenError::NoIndexes { .. } | OpenError::Index { .. }),
        "{said}"
    );
    let made = pushed(&from);
    let copied = copy(&from, &to, &options(), &mut Unwatched).unwrap();
    assert_eq!(outcomes(&copied), [Published::Copied; 2]);
    assert!(copied.artifact.is_some() && made.artifact.is_some());
    for (by, index) in Reader::new(&to).find(None).into_iter().flatten() {
        assert_eq!(by, FoundBy::Image);
        index.unwrap();
    }
    // An image that shares one layer only, in the same registry: that one's index is taken, and no artifact is made.
    let part = put_image(&origin, "other/image", &[&one, &three]);
    let copied = copy(&from, &part, &options(), &mut Unwatched).unwrap();
    assert_eq!(outcomes(&copied)[0], Published::Copied);
    assert_eq!(
        (outcomes(&copied)[1], copied.artifact.as_ref()),
        (Published::Missing, None)
    );
    let (by, index) = Reader::new(&part).find(None).remove(0).unwrap();
    assert_eq!(by, FoundBy::Layer);
    index.unwrap();
    // Then the missing one is made.
    let publication = pushed(&part);
    assert_eq!(outcomes(&publication), [Published::Kept, Published::Made]);
    assert!(matches!(
        copy(&from, &reference(&mirror, "absent"), &options(), &mut Unwatched),
        Err(OpenError::Source(SourceError::Http(error))) if error.status_code().is_some()
    ));
}

/// Opens images of a registry with one cache.
struct Opener<'r> {
    registry: &'r TestRegistry,
    cache: tempfile::TempDir,
}

impl Opener<'_> {
    /// Opens an image; also what was asked for that.
    fn open(
        &self,
        image: &str,
        index: &IndexChoice,
        pin: Option<&Digest>,
    ) -> (Result<Prepared, OpenError>, Vec<String>) {
        let options = OpenOptions {
            index: index.clone(),
            index_digest: pin.cloned(),
            trust: TrustPolicy::of_registry(),
            cache: Some(Cache::new(self.cache.path()).unwrap()),
            registry: options(),
            ..OpenOptions::default()
        };
        self.registry.take_log();
        let prepared = prepare(&self.registry.name(image), &options, &mut Unwatched);
        let asked = self.registry.take_log();
        let asked = asked.iter().map(|asked| format!("{} {}", asked.method, asked.path));
        (prepared, asked.collect())
    }

    fn origins(&self, image: &str, index: &IndexChoice) -> (Vec<IndexOrigin>, Vec<String>) {
        let (prepared, asked) = self.open(image, index, None);
        let origins = prepared.unwrap().layers.iter().map(|layer| layer.origin).collect();
        (origins, asked)
    }
}

fn is_published(origin: &IndexOrigin) -> bool {
    matches!(origin, IndexOrigin::Published { .. })
}

#[test]
fn what_was_found_once_is_kept_and_only_the_tag_is_asked_for() {
    let registry = TestRegistry::start();
    let (one, two) = (Layer::gzip(20), Layer::plain(21));
    let image = put_image(&registry, "some/image", &[&one, &two]);
    let publication = pushed(&image);
    let artifact = publication.artifact.unwrap();
    let opener = Opener {
        registry: &registry,
        cache: tempfile::tempdir().unwrap(),
    };
    let name = "some/image:latest";
    let tag_alone = ["GET /v2/some/image/manifests/latest"];
    let (origins, asked) = opener.origins(name, &IndexChoice::Require);
    assert!(origins.iter().all(is_published));
    // The list that says what refers to the image is enough: its artifact is not asked for.
    assert!(
        !asked.iter().any(|line| line.contains(&artifact.to_string())),
        "{asked:?}"
    );
    for choice in [IndexChoice::Require, IndexChoice::Auto] {
        let (origins, asked) = opener.origins(name, &choice);
        assert_eq!(origins, [IndexOrigin::Kept; 2]);
        assert_eq!(asked, tag_alone);
    }
    // Pinned, the artifact says whether what is kept is what is meant; it is asked for once.
    let (pinned, asked) = opener.open(name, &IndexChoice::Auto, Some(&artifact));
    assert!(
        pinned
            .unwrap()
            .layers
            .iter()
            .all(|layer| layer.origin == IndexOrigin::Kept)
    );
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(asked[1].ends_with(&format!("manifests/{artifact}")), "{asked:?}");
    let (pinned, asked) = opener.open(name, &IndexChoice::Require, Some(&artifact));
    assert!(pinned.is_ok() && asked == tag_alone, "{asked:?}");
    assert!(
        opener
            .open(name, &IndexChoice::Auto, Some(&sha256(b"another")))
            .0
            .is_err()
    );
    // Another artifact with other indexes of the same layers is another pin: they are fetched.
    push(&image, &options(), &anew(SPACING / 2), &mut Unwatched).unwrap();
    let (_, other) = (
        artifact,
        push(&image, &options(), &PushOptions::new(SPACING / 2), &mut Unwatched).unwrap(),
    );
    let (pinned, asked) = opener.open(name, &IndexChoice::Auto, other.artifact.as_ref());
    let pinned = pinned.unwrap();
    assert!(is_published(&pinned.layers[0].origin), "{asked:?}");
    let spans = |index: &Index<Vec<u8>>| index.spans().map_or(0, tarblk::internals::layer::SpanTable::len);
    assert!(spans(&pinned.layers[0].index) > spans(&Index::open(one.index()).unwrap()));
}

#[test]
fn hot_parts_that_are_kept_are_no_indexes_that_were_made_here() {
    let registry = TestRegistry::start();
    let layer = Layer::gzip(22);
    pushed(&put_image(&registry, "some/image", &[&layer]));
    put_image(&registry, "other/image", &[&layer]);
    let opener = Opener {
        registry: &registry,
        cache: tempfile::tempdir().unwrap(),
    };
    let name = "some/image:latest";
    assert!(opener.origins(name, &IndexChoice::Require).0.iter().all(is_published));
    let blob = format!("GET /v2/some/image/blobs/{}", layer.digest());
    // Where nobody has published it, a kept one is not taken for published there.
    let (refused, _) = opener.open("other/image:latest", &IndexChoice::Require, None);
    assert!(matches!(
        refused.unwrap_err(),
        OpenError::NoIndexes { .. } | OpenError::Index { .. }
    ));
    // Who wants none that was published reads the layer.
    let (origins, asked) = opener.origins(name, &IndexChoice::Ignore);
    assert!(
        matches!(origins[..], [IndexOrigin::Read { .. }]) && asked.contains(&blob),
        "{asked:?}"
    );
    // Now both are kept. What was read here serves who takes any, and not who wants a published one.
    let whole = |choice: &IndexChoice| {
        let (prepared, asked) = opener.open(name, choice, None);
        assert!(
            !asked.iter().any(|line| line.contains("referrers") || *line == blob),
            "{asked:?}"
        );
        let layer = prepared.unwrap().into_only().unwrap();
        assert_eq!(layer.origin, IndexOrigin::Kept);
        layer.index.is_whole()
    };
    assert!(whole(&IndexChoice::Auto) && whole(&IndexChoice::Ignore));
    assert!(!whole(&IndexChoice::Require));
    let (origins, asked) = opener.origins(name, &IndexChoice::Build);
    assert!(
        matches!(origins[..], [IndexOrigin::Read { .. }]) && asked.contains(&blob),
        "{asked:?}"
    );
}

#[test]
fn damaged_things_in_the_cache_are_brought_again() {
    let registry = TestRegistry::start();
    let layer = Layer::gzip(23);
    pushed(&put_image(&registry, "some/image", &[&layer]));
    let opener = Opener {
        registry: &registry,
        cache: tempfile::tempdir().unwrap(),
    };
    let name = "some/image:latest";
    opener.origins(name, &IndexChoice::Require);
    let files = |of: &str| -> Vec<_> {
        let dir = opener.cache.path().join(of);
        std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect()
    };
    for (of, damage) in [("hot", 300), ("hot", 10), ("small", 30)] {
        for file in files(of) {
            let mut bytes = std::fs::read(&file).unwrap();
            if bytes.len() > damage {
                bytes[damage] ^= 1;
                std::fs::write(&file, bytes).unwrap();
            }
        }
        let (origins, asked) = opener.origins(name, &IndexChoice::Require);
        assert!(asked.len() > 1, "{of}: {asked:?}");
        assert_eq!(origins.iter().all(is_published), of == "hot");
        assert_eq!(opener.origins(name, &IndexChoice::Require).1.len(), 1);
    }
    // Cut short behind the hot part: nobody knows which index it is of.
    for file in files("hot") {
        let len = std::fs::metadata(&file).unwrap().len();
        std::fs::File::options()
            .write(true)
            .open(&file)
            .unwrap()
            .set_len(len - 10)
            .unwrap();
    }
    assert!(opener.origins(name, &IndexChoice::Require).0.iter().all(is_published));
}

#[test]
fn a_registry_that_answers_no_ranges_is_read_whole() {
    let registry = TestRegistry::start();
    let (one, two) = (Layer::gzip(24), Layer::plain(25));
    let image = put_image(&registry, "some/image", &[&one, &two]);
    registry.rules(|rules| rules.ranges = false);
    let opener = Opener {
        registry: &registry,
        cache: tempfile::tempdir().unwrap(),
    };
    let name = "some/image:latest";
    let read = opener.open(name, &IndexChoice::Ignore, None).0.unwrap();
    assert!(
        read.layers
            .iter()
            .all(|layer| matches!(layer.origin, IndexOrigin::Read { .. }))
    );
    // And its indexes, made there and fetched from there.
    assert_eq!(outcomes(&pushed(&image)), [Published::Made; 2]);
    let found = opener.open(name, &IndexChoice::Require, None).0.unwrap();
    for (layer, made) in found.layers.iter().zip([one.index(), two.index()]) {
        assert!(is_published(&layer.origin));
        assert_eq!(layer.index.hot_digest(), Index::open(made).unwrap().hot_digest());
    }
    assert_eq!(found.payload_bytes(), read.payload_bytes());
}

#[test]
fn a_list_that_outlived_its_indexes_hides_no_others() {
    let registry = TestRegistry::start();
    let layer = Layer::gzip(26);
    let image = put_image(&registry, "some/image", &[&layer]);
    pushed(&image);
    // An artifact with a lower digest than any other, whose index is gone.
    let manifest = Reader::new(&image).image.manifest_digest;
    let gone = |n: u64| Listed {
        digest: sha256(&n.to_le_bytes()),
        ..layer.listed()
    };
    let made = (0..).map(|n| artifact::manifest(&[gone(n)], Some((OCI_MANIFEST, &manifest, 1))));
    let lowest = made.take(64).min_by_key(|bytes| sha256(bytes).to_string()).unwrap();
    registry.put_manifest("some/image", "gone", OCI_MANIFEST, &lowest);
    let opener = Opener {
        registry: &registry,
        cache: tempfile::tempdir().unwrap(),
    };
    let name = "some/image:latest";
    for _ in 0..2 {
        let prepared = opener.open(name, &IndexChoice::Require, None).0.unwrap();
        assert_eq!(
            prepared.layers[0].index.hot_digest(),
            Index::open(layer.index()).unwrap().hot_digest()
        );
    }
    // Who names that artifact gets no other.
    assert!(
        opener
            .open(name, &IndexChoice::Require, Some(&sha256(&lowest)))
            .0
            .is_err()
    );
}

#[test]
fn long_hot_parts_come_over_many_connections() {
    // Names that do not compress make a long hot part of a small layer.
    let mut tar = RawTar::new();
    for n in 0_u64..12_000 {
        let name = sha256(&n.to_le_bytes()).hex().to_owned();
        tar = tar.file(name.as_bytes(), b"");
    }
    let tar = tar.end().0;
    let layer = Layer {
        blob: gzip(&tar),
        tar,
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
    };
    let registry = TestRegistry::start();
    pushed(&put_image(&registry, "some/image", &[&layer]));
    let opener = Opener {
        registry: &registry,
        cache: tempfile::tempdir().unwrap(),
    };
    let (prepared, asked) = opener.open("some/image:latest", &IndexChoice::Require, None);
    let layer = prepared.unwrap().into_only().unwrap();
    let index = format!(
        "GET /v2/some/image/blobs/{}",
        layer_index(&registry, &layer.layer.digest.clone().unwrap())
    );
    let requests = asked.iter().filter(|line| **line == index).count();
    assert!(
        layer.index.hot_len() > 200_000 && (2..=10).contains(&requests),
        "{requests}"
    );
}

/// Which index the registry has for a layer, by its tag.
fn layer_index(registry: &TestRegistry, layer: &Digest) -> Digest {
    let found = Registry::new(&reference(registry, "some/image"), &options()).unwrap();
    let manifest = found.manifest(&layer_tag(layer)).unwrap();
    artifact::parse(&manifest.bytes).unwrap().remove(0).digest
}

/// What a registry says to a question that it does not know.
fn odd_answers() -> Vec<(u16, &'static str, String)> {
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    let digest = sha256(b"");
    let mut odd: Vec<_> = [400, 401, 403, 404, 405, 406, 410, 415, 429, 500, 501, 502, 503, 303]
        .map(|status| (status, "application/json", String::new()))
        .into();
    odd.extend([
        (200, "text/html", "<html>".to_owned()),
        (200, "application/json", "{}".to_owned()),
        (200, INDEX, String::new()),
        (200, INDEX, "<html>".to_owned()),
        (200, INDEX, "{}".to_owned()),
        (200, INDEX, r#"{"manifests":"none"}"#.to_owned()),
        (200, INDEX, r#"{"manifests":[{"digest":"md5:0","size":1}]}"#.to_owned()),
        (
            200,
            INDEX,
            format!(r#"{{"manifests":[{{"digest":"{digest}","size":-1}}]}}"#),
        ),
    ]);
    odd
}

fn instead(method: &'static str, path: &str, answer: &(u16, &'static str, String)) -> Instead {
    Instead {
        method,
        path: path.to_owned(),
        status: answer.0,
        content_type: answer.1,
        body: answer.2.clone(),
    }
}

/// The referrers API may answer anything: it is asked once, and the fallback tag's list is found.
#[test]
fn an_odd_referrers_api_does_not_hide_the_fallback_tag() {
    let registry = TestRegistry::start();
    registry.rules(|rules| rules.referrers_api = false);
    let layer = Layer::gzip(21);
    let image = put_image(&registry, "some/image", &[&layer]);
    pushed(&image);
    for odd in odd_answers() {
        let reader = Reader::new(&image);
        registry.rules(|rules| rules.instead = vec![instead("GET", "/referrers/", &odd)]);
        registry.take_log();
        let (by, index) = reader.find_one().unwrap();
        assert!(by == FoundBy::Image && index.is_ok(), "{odd:?}");
        let asked = registry.take_log();
        let count = |part: &str| asked.iter().filter(|asked| asked.path.contains(part)).count();
        assert_eq!((count("/referrers/"), count("/manifests/sha256-")), (1, 1), "{odd:?}");
        // And publishing goes on.
        registry.rules(|rules| rules.instead = vec![instead("GET", "/referrers/", &odd)]);
        assert_eq!(outcomes(&pushed(&image)), [Published::Kept], "{odd:?}");
        registry.rules(|rules| rules.instead.clear());
    }
}

/// An image without indexes costs one question each, whatever a registry answers to them; and its layers are read.
#[test]
fn optional_questions_are_asked_once() {
    let registry = TestRegistry::start();
    // So that the answer of the fallback tag is waited for.
    registry.rules(|rules| rules.referrers_api = false);
    let layer = Layer::gzip(22);
    let image = put_image(&registry, "some/image", &[&layer]);
    let head = format!("/blobs/{}", layer.digest());
    for odd in odd_answers() {
        for (method, path) in [
            ("GET", "/referrers/"),
            ("GET", "/manifests/sha256-"),
            ("HEAD", head.as_str()),
        ] {
            registry.rules(|rules| rules.instead = vec![instead(method, path, &odd)]);
            registry.take_log();
            let options = OpenOptions {
                registry: options(),
                ..OpenOptions::default()
            };
            let prepared = prepare(
                &ImageName::Registry(image.clone()).to_string(),
                &options,
                &mut Unwatched,
            );
            assert!(matches!(prepared.unwrap().layers[0].origin, IndexOrigin::Read { .. }));
            // This registry says of each layer that its index is itself: two questions, of the layer and of the index.
            let mut seen = std::collections::HashMap::new();
            for asked in registry.take_log() {
                let question = format!("{} {}", asked.method, asked.path);
                let most = match asked.method.as_str() {
                    "HEAD" => 2,
                    _ if asked.path.contains("sha256-") || asked.path.contains("referrers") => 1,
                    _ => continue,
                };
                let times = seen.entry(question.clone()).or_insert(0);
                *times += 1;
                assert!(*times <= most, "{question} again: {odd:?}");
            }
        }
    }
    // A HEAD that says no length still names an index.
    registry.rules(|rules| {
        rules.instead.clear();
        rules.head_lengths = false;
    });
    assert!(Reader::new(&image).find_one().is_none());
}

/// What registries answer to what is put there: any success will do, as long as the digest is right.
#[test]
fn any_success_takes_what_is_pushed() {
    for (manifest, blob, upload) in [(200, 201, 202), (202, 200, 202), (204, 204, 200), (201, 202, 201)] {
        let registry = TestRegistry::start();
        registry.rules(|rules| {
            rules.taken_with = [manifest, blob, upload];
            rules.head_lengths = false;
        });
        let layer = Layer::gzip(23);
        let image = put_image(&registry, "some/image", &[&layer]);
        assert_eq!(outcomes(&pushed(&image)), [Published::Made]);
        assert_eq!(outcomes(&pushed(&image)), [Published::Kept]);
        assert!(Reader::new(&image).find_one().unwrap().1.is_ok());
        registry.rules(|rules| rules.taken_as = Some(sha256(b"something else").to_string()));
        let error = push(&image, &options(), &anew(SPACING), &mut Unwatched)
            .unwrap_err()
            .to_string();
        assert!(error.contains("was pushed"), "{error}");
    }
    // A registry that does not say whether a blob is there is sent it.
    for status in [400, 401, 403, 405, 500] {
        let registry = TestRegistry::start();
        registry.rules(|rules| rules.instead = vec![instead("HEAD", "/blobs/", &(status, "", String::new()))]);
        let image = put_image(&registry, "some/image", &[&Layer::gzip(24)]);
        assert_eq!(outcomes(&pushed(&image)), [Published::Made], "{status}");
    }
}

/// What several manifests share is sent once: registries that are sent one blob several times at once lose it for a moment.
#[test]
fn what_manifests_share_is_sent_once() {
    let registry = TestRegistry::start();
    let layers: Vec<_> = (30..36).map(Layer::gzip).collect();
    let image = put_image(&registry, "some/image", &layers.iter().collect::<Vec<_>>());
    pushed(&image);
    let shared = artifact::empty_config().digest.to_string().replace(':', "%3A");
    let sent = registry
        .take_log()
        .into_iter()
        .filter(|asked| asked.method == "PUT" && asked.query.contains(&shared));
    assert_eq!(sent.count(), 1);
}

/// The list of what refers to an image is others' as well: what is in it stays as it is.
#[test]
fn entries_of_others_stay_in_the_fallback_list() {
    let registry = TestRegistry::start();
    registry.rules(|rules| rules.referrers_api = false);
    let image = put_image(&registry, "some/image", &[&Layer::gzip(25)]);
    let reader = Reader::new(&image);
    let tag = reader.image.manifest_digest.to_string().replace(':', "-");
    let others = serde_json::json!([
        { "mediaType": OCI_MANIFEST, "digest": sha256(b"signature"), "size": 7, "data": "e30=", "x-own": { "a": 1 } },
        { "mediaType": "x", "digest": "blake3:00", "size": 7 },
    ]);
    let list = serde_json::json!({ "schemaVersion": 2, "manifests": others });
    let kind = "application/vnd.oci.image.index.v1+json";
    registry.put_manifest("some/image", &tag, kind, list.to_string().as_bytes());
    pushed(&image);
    let list = reader.registry.manifest(&Version::Tag(tag.clone())).unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list.bytes).unwrap();
    let entries = list["manifests"].as_array().unwrap();
    assert_eq!(entries[..2], others.as_array().unwrap()[..]);
    assert_eq!(entries[2]["artifactType"], ARTIFACT_TYPE);
    assert!(reader.find_one().unwrap().1.is_ok());
    // Something else under the tag is no list, and gives way to one.
    registry.put_manifest("some/image", &tag, "text/html", b"<html>");
    pushed(&image);
    assert_eq!(reader.find_one().unwrap().0, FoundBy::Image);
}

/// Attaching an image asks for nothing that is of no use, however many connections it opens.
#[test]
fn attaching_asks_for_nothing_without_a_use() {
    let registry = TestRegistry::start();
    let image = put_image(&registry, "some/image", &[&Layer::gzip(26), &Layer::plain(27)]);
    pushed(&image);
    registry.take_log();
    let before = registry.accepted();
    let options = OpenOptions {
        trust: TrustPolicy::of_registry(),
        registry: RegistryOptions {
            plain_http: true,
            ..options()
        },
        ..OpenOptions::default()
    };
    let name = ImageName::Registry(image).to_string();
    let prepared = prepare(&name, &options, &mut Unwatched).unwrap();
    let is_published =
        |layer: &tarblk::internals::open::PreparedLayer| matches!(layer.origin, IndexOrigin::Published { .. });
    assert!(prepared.layers.iter().all(is_published));
    let asked = registry.take_log();
    assert!(asked.iter().all(|asked| asked.path != "/v2/"), "{asked:?}");
    // The manifest, the configuration, referrers, two hot parts.
    assert_eq!(asked.len(), 5, "{asked:?}");
    assert!(registry.accepted() - before >= 9);
}
