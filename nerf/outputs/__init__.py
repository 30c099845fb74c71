"""All that a person looks at: pictures, videos, meshes, reports, the live viewer."""
